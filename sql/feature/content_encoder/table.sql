-- feature.content_encoder: one row per trained content encoder; content-addressed by its id, no date
CREATE TABLE IF NOT EXISTS feature.content_encoder (
  encoder_id       STRING COMMENT 'names weights and width; the vectors in feature.item_content_vector carry it',
  model_uri        STRING COMMENT 'MLflow model',
  text_encoder_id  STRING COMMENT 'base encoder of its text vectors, null = none',
  image_encoder_id STRING COMMENT 'base encoder of its image vectors, null = none',
  width            INT COMMENT 'width of its vectors'
)
USING iceberg
COMMENT 'one row per trained content encoder; content-addressed by its id, no date'
TBLPROPERTIES (
  'format-version' = '2',
  'write.metadata.delete-after-commit.enabled' = 'true',
  'write.metadata.previous-versions-max' = '50',
  'write.distribution-mode' = 'hash'
)
