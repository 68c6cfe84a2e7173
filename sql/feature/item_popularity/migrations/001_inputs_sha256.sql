ALTER TABLE feature.item_popularity ADD COLUMNS (inputs_sha256 STRING COMMENT 'digest of the ledger up to the night and of the definition')
