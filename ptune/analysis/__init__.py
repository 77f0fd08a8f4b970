"""What a prompt learned: its neighbours, its likes, its rows that matter."""
