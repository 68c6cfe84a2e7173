-- feature.user_sequence: one row per user with an event before the cutoff
CREATE TABLE IF NOT EXISTS feature.user_sequence (
  logical_date  DATE COMMENT 'night',
  user_id       STRING COMMENT 'user',
  item_ids      ARRAY<STRING> COMMENT 'items, oldest first',
  event_ts      ARRAY<TIMESTAMP> COMMENT 'UTC',
  baskets       ARRAY<INT> COMMENT 'dense index of the session or instant: equal = no order between them',
  num_events    INT COMMENT 'events kept',
  inputs_sha256 STRING COMMENT 'digest of the ledger up to the night, of the definition, order and max_events'
)
USING iceberg
PARTITIONED BY (logical_date)
COMMENT 'one row per user with an event before the cutoff'
TBLPROPERTIES (
  'format-version' = '2',
  'write.metadata.delete-after-commit.enabled' = 'true',
  'write.metadata.previous-versions-max' = '50',
  'write.distribution-mode' = 'hash'
)
