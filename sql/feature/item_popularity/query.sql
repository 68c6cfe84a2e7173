-- Decayed popularity of every item known at :logical_date. Formulae and their NumPy twin: pipeline/popularity.py.
-- Views: item_day_stat (the files of the window and all files after :added_up), listed (item_id of the catalogue files after :added_up),
--        before (item_id, evidence_count, first_event_date of every item known at :added_up; empty when nothing is added up yet).
-- Parameters: :logical_date, :added_up, :inputs_sha256, :window_days, :half_life_days, :head_share, :tail_share.
WITH evidence AS (
  SELECT
    item_id,
    -- Weights are whole numbers of 2^-32 events: a sum of doubles in the order of arrival would differ in its last bits from run to run.
    CASE
      WHEN datediff(:logical_date, event_date) < :window_days
      THEN events * CAST(round(4294967296.0D * power(2.0D, -datediff(:logical_date, event_date) / CAST(:half_life_days AS DOUBLE))) AS BIGINT)
      ELSE 0L
    END AS popularity,
    CASE WHEN logical_date > :added_up THEN events ELSE 0L END AS events,
    event_date
  FROM item_day_stat
  WHERE logical_date <= :logical_date
  UNION ALL
  SELECT item_id, 0L, evidence_count, first_event_date FROM before
  UNION ALL
  SELECT item_id, 0L, 0L, NULL FROM listed
),
scored AS (
  SELECT item_id, sum(popularity) / 4294967296.0D AS popularity, sum(events) AS evidence_count, min(event_date) AS first_event_date
  FROM evidence
  GROUP BY item_id
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
