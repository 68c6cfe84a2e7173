-- What is to be encoded: one row per content that has no vector yet.
-- Views: shown (rows of query.sql that are not stored), item (raw.item of their days).
-- Parameters: :text_given, :image_given (true = the vector comes with the item).
-- Of several items with one content the smallest item_id speaks.
WITH described AS (
  SELECT
    s.encoder_id,
    s.modality,
    s.content_hash,
    s.item_id,
    CASE WHEN s.modality = 'text' AND NOT :text_given THEN i.text WHEN s.modality = 'image' AND NOT :image_given THEN i.image_uri END AS payload,
    CASE WHEN s.modality = 'text' AND :text_given THEN i.text_vector WHEN s.modality = 'image' AND :image_given THEN i.image_vector END AS given,
    CASE WHEN s.modality = 'image' AND i.image_vector IS NULL THEN i.image_hash END AS bytes_hash
  FROM shown AS s
  INNER JOIN item AS i ON i.item_id = s.item_id AND i.file_date = s.file_date
),
wanted AS (
  SELECT encoder_id, modality, content_hash, min(item_id) AS item_id, min_by(struct(payload, given, bytes_hash), item_id) AS first
  FROM described
  WHERE payload IS NOT NULL OR given IS NOT NULL
  GROUP BY encoder_id, modality, content_hash
)
SELECT encoder_id, modality, content_hash, item_id, first.payload, first.given, first.bytes_hash FROM wanted
