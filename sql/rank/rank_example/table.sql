-- rank.rank_example: one row per (release, split, user, item, event): a labelled ranking example
CREATE TABLE IF NOT EXISTS rank.rank_example (
  logical_date       DATE COMMENT 'night of the release it belongs to',
  release            STRING COMMENT 'tag the SIDs are read from',
  split              STRING COMMENT 'train | test',
  user_id            STRING COMMENT 'user',
  item_id            STRING COMMENT 'candidate',
  event_ts           TIMESTAMP COMMENT 'UTC',
  history            ARRAY<STRING> COMMENT 'items before the event, oldest first',
  label              INT COMMENT '1 | 0',
  popularity_stratum STRING COMMENT 'head | torso | tail, at the cutoff',
  popularity_decile  INT COMMENT '0..9 at the cutoff',
  evidence_count     BIGINT COMMENT 'events of the item at the cutoff'
)
USING iceberg
PARTITIONED BY (logical_date)
COMMENT 'one row per (release, split, user, item, event): a labelled ranking example'
TBLPROPERTIES (
  'format-version' = '2',
  'write.metadata.delete-after-commit.enabled' = 'true',
  'write.metadata.previous-versions-max' = '50',
  'write.distribution-mode' = 'hash'
)
