-- The content that items show at :logical_date: a row per item and modality, and whether the vector is stored already.
-- Views: item (raw.item), known (encoder_id, modality, content_hash of feature.item_content_vector).
-- Parameters: :logical_date, :text_encoder_id, :image_encoder_id ('' = none).
-- Only the newest version of an item counts: nothing else is ever joined to it. Hashes alone are read; missing.sql reads what is to be encoded.
WITH version AS (
  SELECT item_id, max_by(struct(file_date, text_hash, image_hash), file_date) AS newest
  FROM item
  WHERE file_date <= :logical_date
  GROUP BY item_id
),
shown AS (
  SELECT :text_encoder_id AS encoder_id, 'text' AS modality, newest.text_hash AS content_hash, item_id, newest.file_date FROM version
  UNION ALL
  SELECT :image_encoder_id, 'image', newest.image_hash, item_id, newest.file_date FROM version
)
SELECT s.encoder_id, s.modality, s.content_hash, s.item_id, s.file_date, k.content_hash IS NOT NULL AS stored
FROM shown AS s
LEFT JOIN known AS k ON k.encoder_id = s.encoder_id AND k.modality = s.modality AND k.content_hash = s.content_hash
WHERE s.encoder_id <> '' AND s.content_hash IS NOT NULL
