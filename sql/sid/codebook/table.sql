-- sid.codebook: one row per code of a generation; immutable
CREATE TABLE IF NOT EXISTS sid.codebook (
  generation INT COMMENT 'vocabulary',
  position   INT COMMENT 'slot, 0-based',
  slot       STRING COMMENT 'name of the position, e.g. shared_0, behavior_2, level_1',
  code       INT COMMENT '0 .. K-1',
  vector     ARRAY<FLOAT> COMMENT 'code row'
)
USING iceberg
PARTITIONED BY (generation)
COMMENT 'one row per code of a generation; immutable'
TBLPROPERTIES (
  'format-version' = '2',
  'write.metadata.delete-after-commit.enabled' = 'true',
  'write.metadata.previous-versions-max' = '50',
  'write.distribution-mode' = 'hash'
)
