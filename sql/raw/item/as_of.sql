-- Items known at :logical_date, from whatever order the files were loaded in.
-- Views: item (raw.item), source_file (raw.source_file), first_event (item_id, first_event_date).
-- :catalogue = snapshot | delta | from_events; only a snapshot retires by absence, on the first snapshot without the item.
WITH observed AS (
  SELECT item_id, file_date, content_hash, lag(content_hash) OVER (PARTITION BY item_id ORDER BY file_date) AS content_before
  FROM item
  WHERE file_date <= :logical_date
),
version AS (
  SELECT
    item_id,
    min(file_date) AS first_listed,
    max(file_date) AS last_listed,
    max(file_date) FILTER (WHERE content_before IS NULL OR content_before <> content_hash) AS valid_from
  FROM observed
  GROUP BY item_id
),
snapshot_day AS (
  SELECT file_date
  FROM source_file
  WHERE kind = 'items' AND status = 'loaded' AND file_date <= :logical_date AND :catalogue = 'snapshot'
),
absence AS (
  SELECT v.item_id, min(s.file_date) AS retired_at
  FROM version AS v
  INNER JOIN snapshot_day AS s ON s.file_date > v.last_listed
  GROUP BY v.item_id
),
sold AS (
  SELECT item_id, first_event_date FROM first_event WHERE first_event_date <= :logical_date
)
SELECT
  coalesce(v.item_id, e.item_id) AS item_id,
  i.title,
  i.text,
  i.category,
  i.image_uri,
  i.text_hash,
  i.image_hash,
  i.content_hash,
  i.text_vector,
  i.image_vector,
  v.valid_from,
  least(v.first_listed, e.first_event_date) AS first_seen,
  a.retired_at
FROM version AS v
FULL OUTER JOIN sold AS e ON e.item_id = v.item_id
LEFT JOIN item AS i ON i.item_id = v.item_id AND i.file_date = v.last_listed
LEFT JOIN absence AS a ON a.item_id = v.item_id
