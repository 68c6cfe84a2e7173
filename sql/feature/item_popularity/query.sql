-- Ranks by popularity: percentile, decile and stratum. Formulae and their NumPy twin: pipeline/popularity.py.
-- Views: scored (rows of scored.sql; read twice, so the job keeps them).
-- Parameters: :logical_date, :inputs_sha256, :head_share, :tail_share.
WITH step AS (
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
