-- The night's manifest: one row per item known at :logical_date.
-- Views: item (sql/raw/item/as_of.sql), item_popularity (the night's partition), content_key (encoder_id, modality, content_hash),
--        trained (item_id, evidence_count, evidence_bucket, richness, strength of the rows trained tonight), parent (its item_feature rows; empty for a new generation).
-- Parameters: :logical_date, :generation, :text_encoder_id, :image_encoder_id (null = none).
-- The joins by item come first: rows are shuffled by item once.
-- A behaviour row is tonight's where it was trained tonight, else the parent's bit by bit, else masked.
SELECT
  :logical_date AS logical_date,
  p.item_id,
  :generation AS generation,
  i.content_hash,
  t.content_hash AS text_hash,
  m.content_hash AS image_hash,
  t.encoder_id AS text_encoder_id,
  m.encoder_id AS image_encoder_id,
  CASE WHEN b.item_id IS NOT NULL THEN :logical_date ELSE old.behavior_date END AS behavior_date,
  CASE WHEN b.item_id IS NOT NULL THEN b.evidence_count ELSE coalesce(old.evidence_count, 0L) END AS evidence_count,
  CASE WHEN b.item_id IS NOT NULL THEN b.evidence_bucket ELSE coalesce(old.evidence_bucket, -1) END AS evidence_bucket,
  CASE WHEN b.item_id IS NOT NULL THEN b.richness ELSE coalesce(old.richness, 0.0F) END AS richness,
  CASE WHEN b.item_id IS NOT NULL THEN b.strength ELSE coalesce(old.strength, 0.0F) END AS strength,
  p.popularity,
  p.popularity_stratum,
  CASE WHEN i.retired_at IS NULL THEN 'live' ELSE 'retired' END AS status,
  i.first_seen,
  i.retired_at
FROM item_popularity AS p
LEFT JOIN item AS i ON i.item_id = p.item_id
LEFT JOIN trained AS b ON b.item_id = p.item_id
LEFT JOIN parent AS old ON old.item_id = p.item_id
LEFT JOIN content_key AS t ON t.encoder_id = :text_encoder_id AND t.modality = 'text' AND t.content_hash = i.text_hash
LEFT JOIN content_key AS m ON m.encoder_id = :image_encoder_id AND m.modality = 'image' AND m.content_hash = i.image_hash
