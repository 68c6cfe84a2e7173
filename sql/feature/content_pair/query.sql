-- Pairs of items that belong together as of :cutoff, by four sources; nothing later than the cutoff is looked at.
-- Views: item (raw.item), interaction (raw.interaction), user_sequence (the night's rows).
-- Parameters: :logical_date, :cutoff, :pairs_per_item, :min_together, :window, :max_holders.
-- category: neighbours on a ring of the category's items in the order of a hash, so that cost does not grow with the square of a category.
-- words: pairs of adjacent words in the title that two items share; of one word pair only :max_holders items are paired, chosen by a hash.
-- session: items of one session (or of one user's day without sessions), the same limit. sequence: items at most :window events apart, of other baskets.
-- Of each source an item brings its :pairs_per_item best pairs; a hash of the pair breaks ties, so no order of rows decides.
WITH known AS (
  SELECT item_id, max_by(struct(title, category), file_date) AS newest
  FROM item
  WHERE file_date <= :logical_date
  GROUP BY item_id
),
ring AS (
  SELECT
    item_id,
    newest.category AS category,
    row_number() OVER (PARTITION BY newest.category ORDER BY xxhash64(item_id), item_id) - 1 AS place,
    count(*) OVER (PARTITION BY newest.category) AS members
  FROM known
  WHERE newest.category IS NOT NULL
),
stepped AS (
  SELECT item_id, category, pmod(place + step, members) AS place
  FROM ring LATERAL VIEW explode(sequence(1, least(:pairs_per_item, members - 1))) AS step
  WHERE members > 1
),
alike AS (
  SELECT 'category' AS source, least(a.item_id, b.item_id) AS left_id, greatest(a.item_id, b.item_id) AS right_id, 1L AS together, 1.0D AS grade
  FROM stepped AS a
  INNER JOIN ring AS b ON b.category = a.category AND b.place = a.place
),
word AS (
  SELECT item_id, filter(split(lower(newest.title), '[^\\p{L}\\p{N}]+'), part -> part <> '') AS words
  FROM known
),
gram AS (
  SELECT DISTINCT item_id, concat_ws(' ', words[at], words[at + 1]) AS holder
  FROM word LATERAL VIEW explode(sequence(0, size(words) - 2)) AS at
  WHERE size(words) > 1
),
event AS (
  SELECT DISTINCT item_id, concat_ws('/', user_id, coalesce(session_id, CAST(to_date(event_ts) AS STRING))) AS holder
  FROM interaction
  WHERE file_date <= :logical_date AND event_ts < :cutoff
),
held AS (
  SELECT 'words' AS source, item_id, holder FROM gram
  UNION ALL
  SELECT 'session', item_id, holder FROM event
),
counted AS (
  SELECT source, item_id, holder, count(*) OVER (PARTITION BY source, item_id) AS held_by,
    row_number() OVER (PARTITION BY source, holder ORDER BY xxhash64(item_id, holder), item_id) AS place
  FROM held
),
chosen AS (
  SELECT source, item_id, holder, held_by FROM counted WHERE place <= :max_holders
),
shared AS (
  SELECT a.source, a.item_id AS left_id, b.item_id AS right_id, count(*) AS together, max(a.held_by) AS left_held, max(b.held_by) AS right_held
  FROM chosen AS a
  INNER JOIN chosen AS b ON b.source = a.source AND b.holder = a.holder AND a.item_id < b.item_id
  GROUP BY a.source, a.item_id, b.item_id
),
flat AS (
  SELECT user_id, at, item_ids[at] AS item_id, baskets[at] AS basket
  FROM user_sequence LATERAL VIEW explode(sequence(0, num_events - 1)) AS at
  WHERE num_events > 1
),
neighbour AS (
  SELECT least(a.item_id, b.item_id) AS left_id, greatest(a.item_id, b.item_id) AS right_id, count(*) AS together
  FROM (SELECT * FROM flat LATERAL VIEW explode(sequence(1, :window)) AS step) AS a
  INNER JOIN flat AS b ON b.user_id = a.user_id AND b.at = a.at + a.step
  WHERE a.item_id <> b.item_id AND a.basket <> b.basket
  GROUP BY 1, 2
),
occurrence AS (
  SELECT item_id, count(*) AS events FROM flat GROUP BY item_id
),
pair AS (
  SELECT DISTINCT source, left_id, right_id, together, grade FROM alike
  UNION ALL
  SELECT
    source,
    left_id,
    right_id,
    together,
    CASE WHEN source = 'words' THEN together / (left_held + right_held - together) ELSE together / sqrt(CAST(left_held AS DOUBLE) * right_held) END
  FROM shared
  WHERE source = 'words' OR together >= :min_together
  UNION ALL
  SELECT 'sequence', n.left_id, n.right_id, n.together, least(1.0D, n.together / (2 * :window * sqrt(CAST(l.events AS DOUBLE) * r.events)))
  FROM neighbour AS n
  INNER JOIN occurrence AS l ON l.item_id = n.left_id
  INNER JOIN occurrence AS r ON r.item_id = n.right_id
  WHERE n.together >= :min_together
),
directed AS (
  SELECT source, left_id AS item_id, right_id AS other_id, together, grade FROM pair
  UNION ALL
  SELECT source, right_id, left_id, together, grade FROM pair
),
ranked AS (
  SELECT
    *,
    row_number() OVER (
      PARTITION BY source, item_id
      ORDER BY grade DESC, xxhash64(least(item_id, other_id), greatest(item_id, other_id)), other_id
    ) AS place
  FROM directed
)
SELECT DISTINCT
  :logical_date AS logical_date,
  source,
  source IN ('session', 'sequence') AS collaborative,
  least(item_id, other_id) AS left_id,
  greatest(item_id, other_id) AS right_id,
  CAST(least(1.0D, grade) AS DOUBLE) AS grade,
  together
FROM ranked
WHERE source = 'category' OR place <= :pairs_per_item
