-- Decayed popularity of every item known at :logical_date. Formulae and their NumPy twin: pipeline/popularity.py.
-- Views: item_day_stat (feature.item_day_stat), known_item (item_id).
-- Parameters: :logical_date, :window_days, :half_life_days, :head_share, :tail_share.
WITH daily AS (
  SELECT item_id, event_date, sum(events) AS events
  FROM item_day_stat
  WHERE logical_date <= :logical_date
  GROUP BY item_id, event_date
),
history AS (
  SELECT
    item_id,
    sum(events) AS evidence_count,
    min(event_date) AS first_event_date,
    -- Added up in the order of days: a sum of doubles in the order of arrival would differ in its last bits from run to run.
    aggregate(
      array_sort(collect_list(struct(datediff(:logical_date, event_date) AS age, events))),
      0.0D,
      (total, day) -> total + CASE WHEN day.age < :window_days THEN day.events * power(2.0D, -day.age / CAST(:half_life_days AS DOUBLE)) ELSE 0.0D END
    ) AS popularity
  FROM daily
  GROUP BY item_id
),
scored AS (
  SELECT
    k.item_id,
    coalesce(h.popularity, 0.0D) AS popularity,
    coalesce(h.evidence_count, 0L) AS evidence_count,
    h.first_event_date
  FROM known_item AS k
  LEFT JOIN history AS h ON h.item_id = k.item_id
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
  datediff(:logical_date, first_event_date) AS days_since_first_event
FROM placed
