ALTER TABLE feature.user_sequence ADD COLUMNS (inputs_sha256 STRING COMMENT 'digest of the ledger up to the night, of the definition, order and max_events')
