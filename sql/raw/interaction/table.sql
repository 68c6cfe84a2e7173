-- raw.interaction: one row per accepted event
CREATE TABLE IF NOT EXISTS raw.interaction (
  file_date  DATE COMMENT 'day of the file that brought it',
  user_id    STRING COMMENT 'user',
  item_id    STRING COMMENT 'item',
  event_ts   TIMESTAMP COMMENT 'UTC',
  event_type STRING COMMENT 'click | cart | buy | rating',
  value      DOUBLE COMMENT 'rating, quantity; 1.0 when the source has none',
  session_id STRING COMMENT 'basket or session; null when the source has none'
)
USING iceberg
PARTITIONED BY (file_date)
COMMENT 'one row per accepted event'
TBLPROPERTIES (
  'format-version' = '2',
  'write.metadata.delete-after-commit.enabled' = 'true',
  'write.metadata.previous-versions-max' = '50',
  'write.distribution-mode' = 'hash',
  'write.spark.fanout.enabled' = 'false'
)
