"""Table Transformer: PubTables-1M, comprehensive table extraction (Smock, Pesala and Abraham, 2022)."""
