-- feature.item_content_vector: one row per (encoder_id, modality, content_hash); content-addressed, no date
CREATE TABLE IF NOT EXISTS feature.item_content_vector (
  encoder_id   STRING COMMENT 'encoder, weights digest and settings',
  modality     STRING COMMENT 'text | image',
  content_hash STRING COMMENT 'sha256 of the text or the image bytes',
  vector       ARRAY<FLOAT> COMMENT 'content vector'
)
USING iceberg
PARTITIONED BY (encoder_id, modality)
COMMENT 'one row per (encoder_id, modality, content_hash); content-addressed, no date'
TBLPROPERTIES (
  'format-version' = '2',
  'write.metadata.delete-after-commit.enabled' = 'true',
  'write.metadata.previous-versions-max' = '50',
  'write.distribution-mode' = 'hash'
)
