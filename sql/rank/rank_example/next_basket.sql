-- Positives: items a user buys for the first time, in any basket but the first. Negatives: items of the positive's own popularity
-- stratum that somebody bought on an earlier day and the user never buys, drawn by hash. The order inside a basket is never read.
-- Views: event (user_id, item_id, instant = start of the basket, tie, value, file_date), popularity (item_id, popularity_stratum).
WITH item AS (
  SELECT
    e.item_id,
    COALESCE(MAX(p.popularity_stratum), 'tail') AS stratum,
    TO_DATE(MIN(e.instant)) AS debut
  FROM event e LEFT JOIN popularity p ON p.item_id = e.item_id
  GROUP BY e.item_id
),
bought AS (
  SELECT user_id, item_id, MIN(STRUCT(instant, file_date)) AS first_time
  FROM event
  GROUP BY user_id, item_id
),
first_basket AS (
  SELECT user_id, MIN(instant) AS instant FROM event GROUP BY user_id
),
positive AS (
  SELECT b.user_id, b.item_id, b.first_time.instant AS instant, TO_DATE(b.first_time.instant) AS day, i.stratum
  FROM bought b
  JOIN first_basket f ON f.user_id = b.user_id
  JOIN item i ON i.item_id = b.item_id
  WHERE b.first_time.instant > f.instant AND b.first_time.file_date > :after
),
-- Inside a stratum items stand in order of their debut, so those seen before a day are the first `size` places.
ranked AS (
  SELECT item_id, stratum, ROW_NUMBER() OVER (PARTITION BY stratum ORDER BY debut, item_id) AS place FROM item
),
debuts AS (
  SELECT stratum, debut, COUNT(*) AS items FROM item GROUP BY stratum, debut
),
pool AS (
  SELECT p.day, p.stratum, SUM(d.items) AS size
  FROM (SELECT DISTINCT day, stratum FROM positive) p
  JOIN debuts d ON d.stratum = p.stratum AND d.debut < p.day
  GROUP BY p.day, p.stratum
),
draw AS (
  SELECT
    p.user_id, p.instant, p.stratum, p.item_id AS positive_id, turn,
    1 + PMOD(XXHASH64(p.user_id, p.item_id, p.instant, turn, :seed), o.size) AS place
  FROM positive p
  JOIN pool o ON o.day = p.day AND o.stratum = p.stratum
  LATERAL VIEW EXPLODE(SEQUENCE(1, :draws)) turns AS turn
),
candidate AS (
  SELECT d.user_id, d.instant, d.positive_id, r.item_id, MIN(d.turn) AS turn
  FROM draw d
  JOIN ranked r ON r.stratum = d.stratum AND r.place = d.place
  LEFT ANTI JOIN bought b ON b.user_id = d.user_id AND b.item_id = r.item_id
  GROUP BY d.user_id, d.instant, d.positive_id, r.item_id
),
-- One item is a negative of at most one positive of a basket, and a positive has at most :negatives of them.
single AS (
  SELECT *, ROW_NUMBER() OVER (PARTITION BY user_id, instant, item_id ORDER BY turn, positive_id) AS claim FROM candidate
),
negative AS (
  SELECT *, ROW_NUMBER() OVER (PARTITION BY user_id, instant, positive_id ORDER BY turn, item_id) AS number FROM single WHERE claim = 1
)
SELECT user_id, item_id, instant, 1 AS label FROM positive
UNION ALL
SELECT user_id, item_id, instant, 0 AS label FROM negative WHERE number <= :negatives
