-- Base vectors that the night's items need in the content encoder's space and that have none there yet: one row per (modality, content_hash).
-- Views: item (raw.item), vector (feature.item_content_vector). Parameters: :logical_date, :encoder_id (the content encoder's),
--        :text_encoder_id, :image_encoder_id (its base encoders, '' = it reads none of that modality).
-- Only the newest version of an item counts: nothing else is ever joined to it.
WITH version AS (
  SELECT item_id, max_by(struct(text_hash, image_hash), file_date) AS newest
  FROM item
  WHERE file_date <= :logical_date
  GROUP BY item_id
),
needed AS (
  SELECT DISTINCT 'text' AS modality, :text_encoder_id AS base_id, newest.text_hash AS content_hash FROM version WHERE newest.text_hash IS NOT NULL
  UNION ALL
  SELECT DISTINCT 'image', :image_encoder_id, newest.image_hash FROM version WHERE newest.image_hash IS NOT NULL
)
SELECT n.modality, n.content_hash, v.vector
FROM needed AS n
INNER JOIN vector AS v ON v.encoder_id = n.base_id AND v.modality = n.modality AND v.content_hash = n.content_hash
LEFT ANTI JOIN vector AS made ON made.encoder_id = :encoder_id AND made.modality = n.modality AND made.content_hash = n.content_hash
