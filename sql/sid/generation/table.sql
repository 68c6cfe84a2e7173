-- sid.generation: one row per fitted vocabulary; immutable, written after its codebook
CREATE TABLE IF NOT EXISTS sid.generation (
  generation         INT COMMENT 'number',
  logical_date       DATE COMMENT 'night that fitted it',
  tokenizer          STRING COMMENT 'variant',
  codebook_sizes     ARRAY<INT> COMMENT 'K per position',
  slots              ARRAY<STRING> COMMENT 'name of each position',
  codebook_digest    STRING COMMENT 'sha256 over the code rows',
  encoder_uri        STRING COMMENT 'MLflow model of the behaviour encoder',
  tokenizer_uri      STRING COMMENT 'MLflow model of the tokenizer',
  richness_reference STRING COMMENT 'JSON: kind, knots, alpha, beta, max_norm',
  text_encoder_id    STRING COMMENT 'null = none',
  image_encoder_id   STRING COMMENT 'null = none',
  config_hash        STRING COMMENT 'configuration that fitted it',
  input_fingerprint  STRING COMMENT 'digest of everything it is a function of'
)
USING iceberg
COMMENT 'one row per fitted vocabulary; immutable, written after its codebook'
TBLPROPERTIES (
  'format-version' = '2',
  'write.metadata.delete-after-commit.enabled' = 'true',
  'write.metadata.previous-versions-max' = '50',
  'write.distribution-mode' = 'hash'
)
