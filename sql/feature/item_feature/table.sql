-- feature.item_feature: one row per item known at the cutoff: the thin manifest the tokenizer joins by
CREATE TABLE IF NOT EXISTS feature.item_feature (
  logical_date       DATE COMMENT 'night',
  item_id            STRING COMMENT 'item',
  generation         INT COMMENT 'vocabulary',
  content_hash       STRING COMMENT 'version of the content',
  text_hash          STRING COMMENT 'null = no text vector',
  image_hash         STRING COMMENT 'null = no image vector',
  text_encoder_id    STRING COMMENT 'null = no text vector',
  image_encoder_id   STRING COMMENT 'null = no image vector',
  behavior_date      DATE COMMENT 'partition of item_behavior_vector that holds the row; null = behaviour masked',
  evidence_count     BIGINT COMMENT 'events behind the behaviour row; 0 when masked',
  evidence_bucket    INT COMMENT 'floor(log2); -1 when masked',
  richness           FLOAT COMMENT 'N in [0, 1] through the frozen reference of the generation',
  strength           FLOAT COMMENT 'alignment strength w (eq. 17)',
  popularity         DOUBLE COMMENT 'decayed count, events',
  popularity_stratum STRING COMMENT 'head | torso | tail',
  status             STRING COMMENT 'live | retired',
  first_seen         DATE COMMENT 'first day in catalogue or events',
  retired_at         DATE COMMENT 'null = live'
)
USING iceberg
PARTITIONED BY (logical_date)
COMMENT 'one row per item known at the cutoff: the thin manifest the tokenizer joins by'
TBLPROPERTIES (
  'format-version' = '2',
  'write.metadata.delete-after-commit.enabled' = 'true',
  'write.metadata.previous-versions-max' = '50',
  'write.distribution-mode' = 'hash'
)
