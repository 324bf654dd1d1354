"""The vision experiment: a shape subnet planted in fresh networks; see `subnets run vision` and docs/vision.md."""
