-- feature.content_pair: one row per (night, source, unordered pair of items) that the content encoder learns from
CREATE TABLE IF NOT EXISTS feature.content_pair (
  logical_date  DATE COMMENT 'night',
  source        STRING COMMENT 'category | words | session | sequence',
  collaborative BOOLEAN COMMENT 'made of behaviour, else of content',
  left_id       STRING COMMENT 'item, the smaller id',
  right_id      STRING COMMENT 'item, the larger id',
  grade         DOUBLE COMMENT 'how alike, in [0, 1]: overlap of word pairs, cosine of occurrences; 1 within a category',
  together      BIGINT COMMENT 'word pairs, sessions or neighbourhoods that both share'
)
USING iceberg
PARTITIONED BY (logical_date)
COMMENT 'one row per (night, source, unordered pair of items) that the content encoder learns from'
TBLPROPERTIES (
  'format-version' = '2',
  'write.metadata.delete-after-commit.enabled' = 'true',
  'write.metadata.previous-versions-max' = '50',
  'write.distribution-mode' = 'hash'
)
