"""A generic Redis client: pipelining, pools, Sentinel, Cluster, scripts. Nothing in it is specific to chat."""
