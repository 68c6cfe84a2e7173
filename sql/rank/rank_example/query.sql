-- Labelled rows with the user's history strictly before the event's instant or basket, and what was known of the item at the cutoff.
-- Views: labelled (user_id, item_id, instant, label), event (user_id, item_id, instant, tie, value, file_date),
-- popularity (item_id, popularity_stratum, popularity_decile, evidence_count) at the release's cutoff.
WITH sequence AS (
  SELECT user_id, ARRAY_SORT(COLLECT_LIST(STRUCT(instant, tie, item_id))) AS events
  FROM event
  GROUP BY user_id
),
moment AS (
  SELECT user_id, instant, CAST(SUM(COUNT(*)) OVER (PARTITION BY user_id ORDER BY instant) - COUNT(*) AS INT) AS earlier
  FROM event
  GROUP BY user_id, instant
),
past AS (
  SELECT
    m.user_id,
    m.instant,
    TRANSFORM(
      SLICE(s.events, GREATEST(m.earlier - :max_history, 0) + 1, LEAST(m.earlier, :max_history)), e -> e.item_id
    ) AS history
  FROM moment m
  JOIN sequence s ON s.user_id = m.user_id
)
SELECT
  CAST(:logical_date AS DATE) AS logical_date,
  :release AS release,
  :split AS split,
  l.user_id,
  l.item_id,
  l.instant AS event_ts,
  h.history,
  l.label,
  COALESCE(p.popularity_stratum, 'tail') AS popularity_stratum,
  COALESCE(p.popularity_decile, 0) AS popularity_decile,
  COALESCE(p.evidence_count, 0) AS evidence_count
FROM labelled l
JOIN past h ON h.user_id = l.user_id AND h.instant = l.instant
LEFT JOIN popularity p ON p.item_id = l.item_id
