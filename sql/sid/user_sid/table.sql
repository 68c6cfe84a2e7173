-- sid.user_sid: one row per (logical_date, user_id), only where the tokenizer makes codes of users; belongs to the release of its date
CREATE TABLE IF NOT EXISTS sid.user_sid (
  logical_date DATE COMMENT 'night',
  user_id      STRING COMMENT 'user with an event before the cutoff',
  codes        ARRAY<INT> COMMENT 'one code per level, a vocabulary of users alone; K = the user took nothing that has content',
  num_items    INT COMMENT 'latest live items that the codes were made from',
  generation   INT COMMENT 'vocabulary'
)
USING iceberg
PARTITIONED BY (logical_date)
COMMENT 'one row per (logical_date, user_id), only where the tokenizer makes codes of users; belongs to the release of its date'
TBLPROPERTIES (
  'format-version' = '2',
  'write.metadata.delete-after-commit.enabled' = 'true',
  'write.metadata.previous-versions-max' = '50',
  'write.distribution-mode' = 'hash'
)
