-- Decayed popularity and evidence of every item known at :logical_date. Formulae and their NumPy twin: pipeline/popularity.py.
-- Views: item_day_stat (the files of the window and all files after :added_up), listed (item_id of the catalogue files after :added_up),
--        before (item_id, evidence_count, first_event_date of every item known at :added_up; empty when nothing is added up yet).
-- Parameters: :logical_date, :added_up, :window_days, :half_life_days.
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
)
SELECT item_id, sum(popularity) / 4294967296.0D AS popularity, sum(events) AS evidence_count, min(event_date) AS first_event_date
FROM evidence
GROUP BY item_id
