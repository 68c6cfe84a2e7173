-- raw.rejected_row: one row per quarantined row, by the stage that refused it
CREATE TABLE IF NOT EXISTS raw.rejected_row (
  logical_date DATE COMMENT 'night or file day',
  stage        STRING COMMENT 'ingest | content_embedding',
  source       STRING COMMENT 'kind and name of the file, e.g. events/2026-11-20.csv',
  reason       STRING COMMENT 'reason code',
  detail       STRING COMMENT 'what was found',
  row          STRING COMMENT 'the row as JSON'
)
USING iceberg
PARTITIONED BY (logical_date, stage)
COMMENT 'one row per quarantined row, by the stage that refused it'
TBLPROPERTIES (
  'format-version' = '2',
  'write.metadata.delete-after-commit.enabled' = 'true',
  'write.metadata.previous-versions-max' = '50',
  'write.distribution-mode' = 'hash',
  'write.spark.fanout.enabled' = 'false'
)
