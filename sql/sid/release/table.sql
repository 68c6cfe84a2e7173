-- sid.release: one row per release: the truth about what is published
CREATE TABLE IF NOT EXISTS sid.release (
  tag               STRING COMMENT 'd<yyyymmdd>[_r<n>]',
  logical_date      DATE COMMENT 'night',
  revision          INT COMMENT '1, 2, ...',
  generation        INT COMMENT 'vocabulary',
  codebook_digest   STRING COMMENT 'digest of its codebook',
  parent_tag        STRING COMMENT 'null = first',
  snapshot_id       BIGINT COMMENT 'snapshot of sid.item_sid',
  rows_digest       STRING COMMENT 'ordered digest of its rows',
  input_fingerprint STRING COMMENT 'digest of everything it is a function of',
  status            STRING COMMENT 'current | superseded | withdrawn',
  refit_due         BOOLEAN COMMENT 'the next night shall fit a new generation',
  drift             STRING COMMENT 'JSON: what gate_drift measured; null = not measured yet',
  items             BIGINT COMMENT 'rows',
  reason            STRING COMMENT 'why it was made'
)
USING iceberg
COMMENT 'one row per release: the truth about what is published'
TBLPROPERTIES (
  'format-version' = '2',
  'write.metadata.delete-after-commit.enabled' = 'true',
  'write.metadata.previous-versions-max' = '50',
  'write.distribution-mode' = 'hash'
)
