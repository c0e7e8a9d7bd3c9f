"""shardray side by side with other runtimes: the same prompts, threads and dtype, one JSON line a run."""
