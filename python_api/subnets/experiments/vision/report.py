def write_report(results, config, folder, images, filters):
    out = []
    for r in results.rows:
        out.append(
            f"{r['condition']:14s} n={r['num_images']} seed={r['seed']} nat={r['natural']:.3f} pooled={r['mean_pooled']:.3f} bias={r['shape_bias']:.3f} {r['seconds']:.0f}s {r['images_per_second']}"
        )
    return "\n".join(out + [str(results.seconds)])
