-- feature.item_day_stat: one row per (file day, event day, item): counts that a night adds up
CREATE TABLE IF NOT EXISTS feature.item_day_stat (
  logical_date  DATE COMMENT 'file_date of the events',
  event_date    DATE COMMENT 'day of the events, earlier than logical_date when they came late',
  item_id       STRING COMMENT 'item',
  events        BIGINT COMMENT 'accepted events',
  source_sha256 STRING COMMENT 'digest of the day file they came from'
)
USING iceberg
PARTITIONED BY (logical_date)
COMMENT 'one row per (file day, event day, item): counts that a night adds up'
TBLPROPERTIES (
  'format-version' = '2',
  'write.metadata.delete-after-commit.enabled' = 'true',
  'write.metadata.previous-versions-max' = '50',
  'write.distribution-mode' = 'hash',
  'write.spark.fanout.enabled' = 'false'
)
