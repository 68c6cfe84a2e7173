-- Accepted events per file day, event day and item, for the file days in `pending`.
-- Views: interaction (raw.interaction), pending (logical_date, sha256).
SELECT
  i.file_date AS logical_date,
  to_date(i.event_ts) AS event_date,
  i.item_id,
  count(*) AS events,
  first(p.sha256) AS source_sha256
FROM interaction AS i
INNER JOIN pending AS p ON p.logical_date = i.file_date
GROUP BY i.file_date, to_date(i.event_ts), i.item_id
