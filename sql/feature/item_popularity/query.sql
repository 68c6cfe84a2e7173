-- Decayed popularity of every item known at :logical_date. Formulae and their NumPy twin: pipeline/popularity.py.
-- Views: item_day_stat (the files of the window and all files after :added_up), listed (item_id of the catalogue files after :added_up),
--        before (item_id, evidence_count, first_event_date of every item known at :added_up; empty when nothing is added up yet).
-- Parameters: :logical_date, :added_up, :inputs_sha256, :window_days, :half_life_days, :head_share, :tail_share.
WITH daily AS (
  SELECT item_id, event_date, sum(events) AS events, sum(CASE WHEN logical_date > :added_up THEN events END) AS new_events
  FROM item_day_stat
  WHERE logical_date <= :logical_date
  GROUP BY item_id, event_date
),
history AS (
  SELECT
    item_id,
    sum(new_events) AS new_events,
    min(event_date) AS first_event_date,
    -- Added up in the order of days: a sum of doubles in the order of arrival would differ in its last bits from run to run.
    aggregate(
      array_sort(collect_list(struct(datediff(:logical_date, event_date) AS age, events)) FILTER (WHERE datediff(:logical_date, event_date) < :window_days)),
      0.0D,
      (total, day) -> total + day.events * power(2.0D, -day.age / CAST(:half_life_days AS DOUBLE))
    ) AS popularity
  FROM daily
  GROUP BY item_id
),
known_item AS (
  SELECT item_id FROM before UNION SELECT item_id FROM listed UNION SELECT item_id FROM history
),
scored AS (
  SELECT
    k.item_id,
    coalesce(h.popularity, 0.0D) AS popularity,
    coalesce(b.evidence_count, 0L) + coalesce(h.new_events, 0L) AS evidence_count,
    least(b.first_event_date, h.first_event_date) AS first_event_date
  FROM known_item AS k
  LEFT JOIN history AS h ON h.item_id = k.item_id
  LEFT JOIN before AS b ON b.item_id = k.item_id
),
step AS (
  SELECT popularity, count(*) AS ties FROM scored GROUP BY popularity
),
ladder AS (
  -- Windows over the whole catalogue see one row per distinct popularity only.
  SELECT popularity, ties, sum(ties) OVER (ORDER BY popularity) - ties AS below, sum(ties) OVER () AS items FROM step
),
placed AS (
  SELECT
    s.*,
    CASE WHEN l.items > 1 THEN (l.below + (l.ties - 1) / 2.0D) / (l.items - 1) ELSE 1.0D END AS percentile,
    l.items - l.below - l.ties + row_number() OVER (PARTITION BY s.popularity ORDER BY s.item_id) AS place,
    l.items
  FROM scored AS s
  INNER JOIN ladder AS l ON l.popularity = s.popularity
)
SELECT
  :logical_date AS logical_date,
  item_id,
  popularity,
  percentile,
  least(CAST(floor(percentile * 10) AS INT), 9) AS popularity_decile,
  CASE
    WHEN popularity = 0 THEN 'tail'
    WHEN place <= floor(CAST(:head_share AS DOUBLE) * items + 0.5D) THEN 'head'
    WHEN place > items - floor(CAST(:tail_share AS DOUBLE) * items + 0.5D) THEN 'tail'
    ELSE 'torso'
  END AS popularity_stratum,
  evidence_count,
  first_event_date,
  datediff(:logical_date, first_event_date) AS days_since_first_event,
  :inputs_sha256 AS inputs_sha256
FROM placed
