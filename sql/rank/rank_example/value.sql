-- One labelled row per event with a value: both classes are real events.
-- Views: event (user_id, item_id, instant, tie, value, file_date). Period: files after :after, up to what the view holds.
SELECT
  user_id,
  item_id,
  instant,
  CAST(value >= :threshold AS INT) AS label
FROM event
WHERE file_date > :after AND value IS NOT NULL
