-- Each user's events before :cutoff in order, the latest :max_events of them.
-- Views: interaction (raw.interaction). Parameters: :logical_date, :cutoff, :order_by (time | basket), :max_events, :inputs_sha256.
-- time: by event_ts; events of one instant share a basket.
-- basket: by the first instant of the event's session; sessions that begin at one instant share a basket, because nothing says which came first.
-- Inside a basket a hash decides, so that no order of ids is learnt; under time it reads nothing but what a stored row of the night before tells again.
WITH known AS (
  SELECT user_id, item_id, event_ts, session_id, file_date
  FROM interaction
  WHERE file_date <= :logical_date AND event_ts < :cutoff
),
keyed AS (
  SELECT
    *,
    CASE WHEN :order_by = 'basket' AND session_id IS NOT NULL THEN min(event_ts) OVER (PARTITION BY user_id, session_id) ELSE event_ts END AS moment,
    CASE WHEN :order_by = 'basket' THEN xxhash64(user_id, item_id, session_id, file_date) ELSE xxhash64(user_id, item_id, event_ts) END AS shuffle
  FROM known
),
placed AS (
  SELECT
    *,
    row_number() OVER (PARTITION BY user_id ORDER BY moment, shuffle, item_id, event_ts) AS place,
    dense_rank() OVER (PARTITION BY user_id ORDER BY moment) AS basket,
    count(*) OVER (PARTITION BY user_id) AS total
  FROM keyed
),
gathered AS (
  SELECT user_id, array_sort(collect_list(struct(place, item_id, event_ts, basket))) AS events
  FROM placed
  WHERE place > total - :max_events
  GROUP BY user_id
)
SELECT
  :logical_date AS logical_date,
  user_id,
  events.item_id AS item_ids,
  events.event_ts AS event_ts,
  transform(events.basket, basket -> basket - events.basket[0]) AS baskets,
  size(events) AS num_events,
  :inputs_sha256 AS inputs_sha256
FROM gathered
