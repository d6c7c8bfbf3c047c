//! Directions that are spread evenly over the positive orthant.

/// Returns the points of Das and Dennis (1998): all vectors of `n_objectives` multiples of
/// `1 / partitions` that add up to 1. There are `(n_objectives + partitions - 1)` over `partitions`
/// of them.
pub(super) fn das_dennis(n_objectives: usize, partitions: usize) -> Vec<Vec<f64>> {
    let mut found = Vec::new();
    let mut counts = Vec::with_capacity(n_objectives);
    extend(&mut counts, n_objectives, partitions, &mut found);
    let scale = partitions.max(1) as f64;
    found
        .into_iter()
        .map(|counts| {
            counts
                .into_iter()
                .map(|count| count as f64 / scale)
                .collect()
        })
        .collect()
}

fn extend(counts: &mut Vec<usize>, n: usize, left: usize, found: &mut Vec<Vec<usize>>) {
    if counts.len() + 1 >= n {
        counts.push(left);
        found.push(counts.clone());
        counts.pop();
        return;
    }
    for count in 0..=left {
        counts.push(count);
        extend(counts, n, left - count, found);
        counts.pop();
    }
}
