"""What an evaluation says: intervals, verdicts, the gate's decision."""
