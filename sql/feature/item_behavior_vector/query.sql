-- Tonight's behaviour rows with the events that trained them.
-- Views: behavior_row (item_id, vector, norm: from the model), item_popularity. Parameters: :logical_date, :generation.
-- The bucket is the number of binary digits less one, because a logarithm is not exact at powers of two.
SELECT
  :logical_date AS logical_date,
  row.item_id,
  CAST(:generation AS INT) AS generation,
  row.vector,
  row.norm,
  item.evidence_count,
  CAST(length(bin(item.evidence_count)) - 1 AS INT) AS evidence_bucket
FROM behavior_row AS row
LEFT JOIN item_popularity AS item ON item.item_id = row.item_id AND item.logical_date = :logical_date
