-- raw.source_file: one row per (file_date, kind): the ledger and the marker of ingest
CREATE TABLE IF NOT EXISTS raw.source_file (
  file_date DATE COMMENT 'day of the file',
  kind      STRING COMMENT 'events | items',
  path      STRING COMMENT 'where it was read from',
  sha256    STRING COMMENT 'digest of the bytes, empty when absent',
  bytes     BIGINT COMMENT 'size',
  rows_in   BIGINT COMMENT 'rows read',
  rejected  BIGINT COMMENT 'rows that went to raw.rejected_row',
  status    STRING COMMENT 'loaded | declared_empty | missing'
)
USING iceberg
PARTITIONED BY (file_date)
COMMENT 'one row per (file_date, kind): the ledger and the marker of ingest'
TBLPROPERTIES (
  'format-version' = '2',
  'write.metadata.delete-after-commit.enabled' = 'true',
  'write.metadata.previous-versions-max' = '50',
  'write.distribution-mode' = 'hash',
  'write.spark.fanout.enabled' = 'false'
)
