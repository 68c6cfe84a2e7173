-- Content the items need at :logical_date: one row per (encoder_id, modality, content_hash), and whether its vector is stored already.
-- Views: item (raw.item), known (encoder_id, modality, content_hash of feature.item_content_vector).
-- Parameters: :logical_date, :text_encoder_id, :image_encoder_id ('' = none), :text_given, :image_given (true = the vector comes with the item).
-- Only the newest version of an item counts: nothing else is ever joined to it. Of several items with one content the smallest item_id speaks.
WITH version AS (
  SELECT item_id, max_by(struct(text, text_hash, text_vector, image_uri, image_hash, image_vector), file_date) AS newest
  FROM item
  WHERE file_date <= :logical_date
  GROUP BY item_id
),
content AS (
  SELECT
    :text_encoder_id AS encoder_id,
    'text' AS modality,
    newest.text_hash AS content_hash,
    item_id,
    CASE WHEN NOT :text_given THEN newest.text END AS payload,
    CASE WHEN :text_given THEN newest.text_vector END AS given,
    CAST(NULL AS STRING) AS bytes_hash
  FROM version
  UNION ALL
  SELECT
    :image_encoder_id,
    'image',
    newest.image_hash,
    item_id,
    CASE WHEN NOT :image_given THEN newest.image_uri END,
    CASE WHEN :image_given THEN newest.image_vector END,
    CASE WHEN newest.image_vector IS NULL THEN newest.image_hash END
  FROM version
),
wanted AS (
  SELECT encoder_id, modality, content_hash, min(item_id) AS item_id, min_by(struct(payload, given, bytes_hash), item_id) AS first
  FROM content
  WHERE encoder_id <> '' AND content_hash IS NOT NULL AND (payload IS NOT NULL OR given IS NOT NULL)
  GROUP BY encoder_id, modality, content_hash
)
SELECT w.encoder_id, w.modality, w.content_hash, w.item_id, w.first.payload, w.first.given, w.first.bytes_hash, k.content_hash IS NOT NULL AS stored
FROM wanted AS w
LEFT JOIN known AS k ON k.encoder_id = w.encoder_id AND k.modality = w.modality AND k.content_hash = w.content_hash
