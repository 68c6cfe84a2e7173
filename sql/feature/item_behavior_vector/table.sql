-- feature.item_behavior_vector: one row per item whose behaviour row was trained on this night
CREATE TABLE IF NOT EXISTS feature.item_behavior_vector (
  logical_date    DATE COMMENT 'night that trained it',
  item_id         STRING COMMENT 'item',
  generation      INT COMMENT 'vocabulary',
  vector          ARRAY<FLOAT> COMMENT 'behaviour vector, NOT normalised',
  norm            FLOAT COMMENT 'L2 norm',
  evidence_count  BIGINT COMMENT 'events that trained the row',
  evidence_bucket INT COMMENT 'floor(log2(evidence_count))'
)
USING iceberg
PARTITIONED BY (logical_date)
COMMENT 'one row per item whose behaviour row was trained on this night'
TBLPROPERTIES (
  'format-version' = '2',
  'write.metadata.delete-after-commit.enabled' = 'true',
  'write.metadata.previous-versions-max' = '50',
  'write.distribution-mode' = 'hash'
)
