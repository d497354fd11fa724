from skyreels_fast.cli import generate_video_df

if __name__ == "__main__":
    raise SystemExit(generate_video_df())
