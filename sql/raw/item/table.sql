-- raw.item: one row per item observed in a catalogue file
CREATE TABLE IF NOT EXISTS raw.item (
  file_date    DATE COMMENT 'day of the file that brought it',
  item_id      STRING COMMENT 'item',
  title        STRING COMMENT 'what a person reads',
  text         STRING COMMENT 'what the text encoder reads; null = no text',
  category     STRING COMMENT 'coarse class; null when unknown',
  image_uri    STRING COMMENT 'where the picture is; null = no image',
  text_hash    STRING COMMENT 'sha256 of text; null = no text',
  image_hash   STRING COMMENT 'sha256 of the image bytes; null = no readable image',
  content_hash STRING COMMENT 'sha256 over title, text, category, image_hash; a new value is a new version',
  text_vector  ARRAY<FLOAT> COMMENT 'given vector (encoder precomputed), else null',
  image_vector ARRAY<FLOAT> COMMENT 'given vector (encoder precomputed), else null'
)
USING iceberg
PARTITIONED BY (file_date)
COMMENT 'one row per item observed in a catalogue file'
TBLPROPERTIES (
  'format-version' = '2',
  'write.metadata.delete-after-commit.enabled' = 'true',
  'write.metadata.previous-versions-max' = '50',
  'write.distribution-mode' = 'hash',
  'write.spark.fanout.enabled' = 'false'
)
