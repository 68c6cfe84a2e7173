-- sid.item_sid: one row per (logical_date, item_id); read only through lakehouse.read_release
CREATE TABLE IF NOT EXISTS sid.item_sid (
  logical_date        DATE COMMENT 'night',
  item_id             STRING COMMENT 'item',
  codes               ARRAY<INT> COMMENT 'one code per position; K = masked slot',
  weights             ARRAY<FLOAT> COMMENT 'router weights; 1.0 for content positions, 0.0 for masked slots',
  disambiguator       INT COMMENT '0 for the first item of a code tuple, never renumbered',
  popularity          DOUBLE COMMENT 'decayed count, events',
  popularity_stratum  STRING COMMENT 'head | torso | tail',
  status              STRING COMMENT 'live | retired',
  is_new              BOOLEAN COMMENT 'not in the parent',
  first_seen          DATE COMMENT 'first day',
  retired_at          DATE COMMENT 'null = live',
  changed_from_parent BOOLEAN COMMENT 'codes differ from the parent',
  generation          INT COMMENT 'vocabulary'
)
USING iceberg
PARTITIONED BY (logical_date)
COMMENT 'one row per (logical_date, item_id); read only through lakehouse.read_release'
TBLPROPERTIES (
  'format-version' = '2',
  'write.metadata.delete-after-commit.enabled' = 'true',
  'write.metadata.previous-versions-max' = '50',
  'write.distribution-mode' = 'hash'
)
