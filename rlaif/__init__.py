"""The command `rlaif`; what can be imported lies in `data`, `scoring`, `training`, `tasks` and `flows`."""
