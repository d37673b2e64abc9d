"""`prepare`: annotated images -> Parquet shards and dataset.json.

1. sources, listing, image_names    find annotation files and images, and match them
2. plan            which images go into which shard; what is wrong with the source
   defects, defect_table, cell_defects    each known defect, its rule and how it is reported
   set_intensity   the intensity rule of the whole set
3. draw            images and annotations -> one shard
4. shards          the dataset on disk, written and read
   description     dataset.json
5. prepare         the command: 1 to 4 on Ray Data
"""
