"""The domain of hasgpu: values, the cluster snapshot and the policies; standard library only."""
