"""A generic Redis client: pipelining, pools, Sentinel, Cluster, scripts. It knows nothing of chat."""
