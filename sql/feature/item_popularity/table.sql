-- feature.item_popularity: one row per item known at the cutoff, with or without events
CREATE TABLE IF NOT EXISTS feature.item_popularity (
  logical_date           DATE COMMENT 'night',
  item_id                STRING COMMENT 'item',
  popularity             DOUBLE COMMENT 'decayed count, events',
  percentile             DOUBLE COMMENT 'rank by popularity in [0, 1], 1 = most popular, ties share the mean',
  popularity_decile      INT COMMENT '0 (least) .. 9 (most)',
  popularity_stratum     STRING COMMENT 'head | torso | tail',
  evidence_count         BIGINT COMMENT 'all events so far, never decayed',
  first_event_date       DATE COMMENT 'day of the first event; null without events',
  days_since_first_event INT COMMENT 'days; null without events',
  inputs_sha256          STRING COMMENT 'digest of the ledger up to the night and of the definition'
)
USING iceberg
PARTITIONED BY (logical_date)
COMMENT 'one row per item known at the cutoff, with or without events'
TBLPROPERTIES (
  'format-version' = '2',
  'write.metadata.delete-after-commit.enabled' = 'true',
  'write.metadata.previous-versions-max' = '50',
  'write.distribution-mode' = 'hash'
)
