//! Dominance, fronts and quality of fronts, for objectives that are minimised.
//!
//! The fast non-dominated sort and the crowding distance are those of NSGA-II (Deb et al., 2002).
//! The hypervolume in three or more dimensions uses WFG (While, Bradstreet, Barone, 2012). NaN
//! counts as positive infinity everywhere.

/// Returns the value, or positive infinity for NaN.
pub(super) fn nan_is_worst(value: f64) -> f64 {
    if value.is_nan() { f64::INFINITY } else { value }
}

/// Returns whether `a` is better than `b` in at least one objective and worse in none. Both must
/// have the same number of objectives.
pub(super) fn dominates(a: &[f64], b: &[f64]) -> bool {
    let mut better = false;
    for (&x, &y) in a.iter().zip(b) {
        let (x, y) = (nan_is_worst(x), nan_is_worst(y));
        if x > y {
            return false;
        }
        better |= x < y;
    }
    better
}

/// Returns the ascending indices of the points that no other point dominates. Equal points are all
/// included or all excluded. The cost is O(M N^2).
pub(super) fn non_dominated<P: AsRef<[f64]>>(points: &[P]) -> Vec<usize> {
    let dominated = |point: &P| {
        points
            .iter()
            .any(|other| dominates(other.as_ref(), point.as_ref()))
    };
    (0..points.len())
        .filter(|&index| !dominated(&points[index]))
        .collect()
}

/// Returns the fronts of a set: the non-dominated points, then the points that are non-dominated
/// without the first front, and so on. Each front lists its indices in ascending order. The cost is
/// O(M N^2).
pub(super) fn fast_non_dominated_sort<P: AsRef<[f64]>>(points: &[P]) -> Vec<Vec<usize>> {
    let n = points.len();
    let mut beaten_by_count = vec![0usize; n];
    let mut beats: Vec<Vec<usize>> = vec![Vec::new(); n];
    for i in 0..n {
        for j in i + 1..n {
            let (a, b) = (points[i].as_ref(), points[j].as_ref());
            if dominates(a, b) {
                beats[i].push(j);
                beaten_by_count[j] += 1;
            } else if dominates(b, a) {
                beats[j].push(i);
                beaten_by_count[i] += 1;
            }
        }
    }
    let mut fronts = Vec::new();
    let mut front: Vec<usize> = (0..n).filter(|&i| beaten_by_count[i] == 0).collect();
    while !front.is_empty() {
        let mut next = Vec::new();
        for &i in &front {
            for &j in &beats[i] {
                beaten_by_count[j] -= 1;
                if beaten_by_count[j] == 0 {
                    next.push(j);
                }
            }
        }
        next.sort_unstable();
        fronts.push(std::mem::replace(&mut front, next));
    }
    fronts
}

/// Returns the crowding distance of each point of a front: the sum over objectives of the
/// normalised gap between its neighbours, and infinity for the ends. An objective that is equal for
/// all points adds nothing, and a gap to infinity counts as 1.
pub(super) fn crowding_distance<P: AsRef<[f64]>>(front: &[P]) -> Vec<f64> {
    let n = front.len();
    let n_objectives = front.first().map_or(0, |point| point.as_ref().len());
    if n <= 2 {
        return vec![f64::INFINITY; n];
    }
    let mut distance = vec![0.0; n];
    let mut order: Vec<usize> = (0..n).collect();
    for objective in 0..n_objectives {
        let value = |i: usize| {
            front[i]
                .as_ref()
                .get(objective)
                .map_or(f64::INFINITY, |&value| nan_is_worst(value))
        };
        order.sort_by(|&a, &b| value(a).total_cmp(&value(b)).then(a.cmp(&b)));
        let low = value(order[0]);
        let high = order
            .iter()
            .rev()
            .map(|&i| value(i))
            .find(|value| value.is_finite())
            .unwrap_or(low);
        if value(order[n - 1]) == low {
            continue;
        }
        distance[order[0]] = f64::INFINITY;
        distance[order[n - 1]] = f64::INFINITY;
        for window in order.windows(3) {
            let gap = (value(window[2]) - value(window[0])) / (high - low);
            distance[window[1]] += match gap.is_finite() {
                true => gap,
                false if value(window[2]) == value(window[0]) => 0.0,
                false => 1.0,
            };
        }
    }
    distance
}

/// Returns the exact volume that the points dominate up to `reference`. Points that are not better
/// than the reference in every objective add nothing. The cost is O(N log N) in two dimensions. In
/// three or more it is exponential in N in the worst case, so fronts should have at most about 100
/// points.
pub fn hypervolume<P: AsRef<[f64]>>(points: &[P], reference: &[f64]) -> f64 {
    let inside = |point: &&[f64]| {
        point.len() == reference.len() && point.iter().zip(reference).all(|(x, r)| x < r)
    };
    let points: Vec<&[f64]> = points.iter().map(AsRef::as_ref).filter(inside).collect();
    if points.is_empty() || reference.is_empty() {
        return 0.0;
    }
    if reference.len() == 2 {
        return area(points, reference);
    }
    let front = non_dominated(&points)
        .into_iter()
        .map(|i| points[i].to_vec())
        .collect();
    wfg(front, reference)
}

fn area(mut points: Vec<&[f64]>, reference: &[f64]) -> f64 {
    points.sort_by(|a, b| a[0].total_cmp(&b[0]).then(a[1].total_cmp(&b[1])));
    let (mut sum, mut ceiling) = (0.0, reference[1]);
    for point in points {
        if point[1] < ceiling {
            sum += (reference[0] - point[0]) * (ceiling - point[1]);
            ceiling = point[1];
        }
    }
    sum
}

/// Returns the sum over the points of the volume that each dominates and the points after it do
/// not.
fn wfg(mut front: Vec<Vec<f64>>, reference: &[f64]) -> f64 {
    // Sort the worst points first, which leaves the smallest sets for the recursion.
    front.sort_by(|a, b| {
        b.iter()
            .zip(a)
            .map(|(y, x)| y.total_cmp(x))
            .find(|o| o.is_ne())
            .unwrap_or(std::cmp::Ordering::Equal)
    });
    let mut sum = 0.0;
    for (at, point) in front.iter().enumerate() {
        let volume: f64 = point.iter().zip(reference).map(|(x, r)| r - x).product();
        let limited: Vec<Vec<f64>> = front[at + 1..]
            .iter()
            .map(|other| other.iter().zip(point).map(|(x, y)| x.max(*y)).collect())
            .collect();
        sum += volume;
        if !limited.is_empty() {
            // Equal points must count once, but `non_dominated` keeps them all.
            let mut kept: Vec<Vec<f64>> = non_dominated(&limited)
                .into_iter()
                .map(|i| limited[i].clone())
                .collect();
            kept.sort_by(|a, b| {
                a.iter()
                    .zip(b)
                    .map(|(x, y)| x.total_cmp(y))
                    .find(|o| o.is_ne())
                    .unwrap_or(std::cmp::Ordering::Equal)
            });
            kept.dedup();
            sum -= wfg(kept, reference);
        }
    }
    sum
}

/// Returns the inverted generational distance: the mean Euclidean distance from the points of a
/// reference front to the nearest found point. It is infinite if nothing was found, and 0 for an
/// empty reference.
pub fn igd<P: AsRef<[f64]>, R: AsRef<[f64]>>(found: &[P], reference: &[R]) -> f64 {
    if reference.is_empty() {
        return 0.0;
    }
    let distance = |target: &[f64]| {
        let squared = |point: &P| {
            target
                .iter()
                .zip(point.as_ref())
                .map(|(a, b)| (a - nan_is_worst(*b)).powi(2))
                .sum()
        };
        found
            .iter()
            .map(squared)
            .fold(f64::INFINITY, f64::min)
            .sqrt()
    };
    reference
        .iter()
        .map(|target| distance(target.as_ref()))
        .sum::<f64>()
        / reference.len() as f64
}
