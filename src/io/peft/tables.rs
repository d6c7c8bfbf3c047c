//! Embedding and head under an adapter. The two may be one matrix before, and two after.

use std::collections::BTreeMap;

use super::changes::{BaseChanges, BaseInit, Stored};
use super::{LoraAdapter, LoraWeights};
use crate::arch::Architecture;
use crate::error::{Error, Result};
use crate::io::fields::bad_field;
use crate::linalg::Matrix;

/// Embedding and head, `[vocab_size, d_model]` each.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tables {
    pub embedding: Matrix,
    /// `None` if tied to the embedding.
    pub head: Option<Matrix>,
}

/// Module path of the embedding.
pub(crate) const EMBEDDING_MODULE: &str = "model.embed_tokens";

/// Whether a module is the embedding or the head.
pub(crate) fn is_table(module: &str) -> bool {
    [EMBEDDING_MODULE, Architecture::HEAD_LAYER].contains(&module)
}

impl Tables {
    fn get(&mut self, module: &str) -> &mut Matrix {
        match &mut self.head {
            Some(head) if module == Architecture::HEAD_LAYER => head,
            _ => &mut self.embedding,
        }
    }

    fn untie(&mut self) {
        if self.head.is_none() {
            self.head = Some(self.embedding.clone());
        }
    }
}

impl LoraAdapter {
    /// Returns whether embedding or head change.
    pub(crate) fn changes_tables(&self) -> bool {
        let changes = &self.changes;
        [EMBEDDING_MODULE, Architecture::HEAD_LAYER]
            .iter()
            .any(|module| {
                self.layers.contains_key(*module)
                    || changes.tokens.contains_key(*module)
                    || changes
                        .whole()
                        .any(|(name, _)| *name == format!("{module}.weight"))
            })
    }

    /// Returns embedding and head with everything that the adapter does to them. Their number of
    /// rows is the new size of the vocabulary.
    ///
    /// Where both are one matrix, PEFT treats them apart, unless the adapter says
    /// `ensure_weight_tying`; token rows go into both, and so does a matrix that is stored for the
    /// base rather than for one of them.
    ///
    /// # Errors
    /// Returns [`Error::TensorShape`] for a matrix, pair or rows that do not fit,
    /// [`Error::TokenOutOfRange`] for a row outside the matrix, and the errors of
    /// [`BaseChanges::applied`].
    pub(crate) fn changed_tables(&self, mut tables: Tables) -> Result<Tables> {
        let changes = &self.changes;
        let (embedding, head) = (EMBEDDING_MODULE, Architecture::HEAD_LAYER);
        let was_tied = tables.head.is_none();
        let d_model = tables.embedding.cols();
        let stored = |of: &BTreeMap<String, Stored>, module: &str| -> Result<Option<Matrix>> {
            let name = format!("{module}.weight");
            let stored = of.get(&name);
            stored
                .map(|stored| stored.table(&name, d_model))
                .transpose()
        };
        // The base's own matrices, with new rows perhaps.
        let given = &changes.tensors;
        let given = [stored(given, embedding)?, stored(given, head)?];
        if let [Some(one), Some(other)] = &given
            && one != other
        {
            tables.untie();
        }
        for (module, given) in [embedding, head].into_iter().zip(given) {
            if let Some(given) = given {
                *tables.get(module) = given;
            }
        }
        // Copies of one of them.
        let copies = &changes.copies;
        let copies = [stored(copies, embedding)?, stored(copies, head)?];
        let alike = changes.tied && (copies.contains(&None) || copies[0] == copies[1]);
        if copies.iter().any(Option::is_some) && !alike {
            tables.untie();
        }
        for (module, copy) in [embedding, head].into_iter().zip(copies) {
            if let Some(copy) = copy {
                *tables.get(module) = copy;
            }
        }
        self.set_token_rows(&mut tables)?;
        self.add_pairs(&mut tables, was_tied)?;
        if let Some(head) = &tables.head {
            if head.rows() != tables.embedding.rows() {
                return Err(Error::TensorShape {
                    tensor: Architecture::HEAD.into(),
                    expected: vec![tables.embedding.rows(), d_model],
                    found: vec![head.rows(), head.cols()],
                });
            }
            if was_tied && *head == tables.embedding {
                tables.head = None;
            }
        }
        Ok(tables)
    }

    fn set_token_rows(&self, tables: &mut Tables) -> Result<()> {
        let rows = &self.changes.tokens;
        let (of_embedding, of_head) = (
            rows.get(EMBEDDING_MODULE),
            rows.get(Architecture::HEAD_LAYER),
        );
        if of_head.is_some() && of_head != of_embedding {
            tables.untie();
        }
        for (module, new) in [
            (EMBEDDING_MODULE, of_embedding),
            (Architecture::HEAD_LAYER, of_head),
        ] {
            let Some(new) = new else { continue };
            let table = tables.get(module);
            let expected = vec![new.tokens.len(), table.cols()];
            let found = vec![new.rows.rows(), new.rows.cols()];
            if expected != found {
                return Err(Error::TensorShape {
                    tensor: format!("{module}.token_adapter.trainable_tokens_delta"),
                    expected,
                    found,
                });
            }
            for (index, token) in new.tokens.iter().enumerate() {
                let row = *token as usize;
                if row >= table.rows() {
                    return Err(Error::TokenOutOfRange {
                        found: *token,
                        vocab_size: table.rows(),
                    });
                }
                table.row_mut(row).copy_from_slice(new.rows.row(index));
            }
        }
        Ok(())
    }

    fn add_pairs(&self, tables: &mut Tables, was_tied: bool) -> Result<()> {
        let changes = &self.changes;
        let (embedding, head) = (EMBEDDING_MODULE, Architecture::HEAD_LAYER);
        let (of_embedding, of_head) = (self.layers.get(embedding), self.layers.get(head));
        if of_embedding.is_none() && of_head.is_none() {
            return Ok(());
        }
        if let Some(pair) = of_head
            && changes.init != BaseInit::Unchanged
            && !changes.tensors.contains_key(Architecture::HEAD)
        {
            // PEFT takes the part from the matrix itself, also where the embedding shares it.
            check(head, size(tables.get(head)), pair)?;
            let table = tables.get(head);
            *table = changes.left_by_init(head, table.clone(), pair)?;
        }
        let mirrored = was_tied && changes.tied && (of_embedding.is_none() || of_head.is_none());
        if !mirrored {
            tables.untie();
        }
        if let Some(pair) = of_embedding {
            let table = tables.get(embedding);
            check(embedding, size(table), pair)?;
            *table = embedding_with(changes, table, pair)?;
        }
        if let Some(pair) = of_head {
            let table = tables.get(head);
            check(head, size(table), pair)?;
            // The initialization was done above.
            let without_init = BaseChanges {
                magnitudes: changes
                    .magnitudes
                    .get(head)
                    .map(|m| (head.to_string(), m.clone()))
                    .into_iter()
                    .collect(),
                ..BaseChanges::default()
            };
            let (base, pair) = without_init.applied(head, table.clone(), pair)?;
            *table = added(base, &pair);
        }
        Ok(())
    }
}

impl Stored {
    fn table(&self, name: &str, d_model: usize) -> Result<Matrix> {
        match self.shape.as_slice() {
            [rows, cols] if *cols == d_model && *rows > 0 => {
                Matrix::new(*rows, *cols, self.values.clone())
            }
            found => Err(Error::TensorShape {
                tensor: name.into(),
                expected: vec![found.first().copied().unwrap_or(1).max(1), d_model],
                found: found.to_vec(),
            }),
        }
    }
}

fn check(module: &str, [rows, cols]: [usize; 2], pair: &LoraWeights) -> Result<()> {
    let (expected, found) = (vec![rows, cols], vec![pair.d_output(), pair.d_input()]);
    if expected != found {
        return Err(Error::TensorShape {
            tensor: format!("{module}.lora"),
            expected,
            found,
        });
    }
    Ok(())
}

fn size(table: &Matrix) -> [usize; 2] {
    [table.rows(), table.cols()]
}

pub(super) fn added(mut weight: Matrix, pair: &LoraWeights) -> Matrix {
    let delta = pair.delta();
    let sums = weight.as_mut_slice().iter_mut().zip(delta.as_slice());
    sums.for_each(|(w, d)| *w += d);
    weight
}

/// Returns the embedding plus the product of its pair. DoRA's magnitudes are those of its columns.
fn embedding_with(changes: &BaseChanges, table: &Matrix, pair: &LoraWeights) -> Result<Matrix> {
    let mut sum = added(table.clone(), pair);
    let Some(magnitudes) = changes.magnitudes.get(EMBEDDING_MODULE) else {
        return Ok(sum);
    };
    let name = || format!("{EMBEDDING_MODULE}.lora_magnitude_vector");
    if magnitudes.len() != sum.cols() {
        return Err(Error::TensorShape {
            tensor: name(),
            expected: vec![sum.cols()],
            found: vec![magnitudes.len()],
        });
    }
    let mut squares = vec![0.0_f64; sum.cols()];
    for row in 0..sum.rows() {
        for (square, value) in squares.iter_mut().zip(sum.row(row)) {
            *square += f64::from(*value).powi(2);
        }
    }
    let factors: Vec<f32> = squares
        .iter()
        .zip(magnitudes)
        .map(|(square, magnitude)| (f64::from(*magnitude) / square.sqrt()) as f32)
        .collect();
    if let Some(index) = factors.iter().position(|factor| !factor.is_finite()) {
        return Err(Error::NotFinite {
            tensor: name(),
            index,
            value: factors[index],
        });
    }
    for row in 0..sum.rows() {
        let values = sum.row_mut(row).iter_mut().zip(&factors);
        values.for_each(|(value, factor)| *value *= factor);
    }
    Ok(sum)
}

impl LoraAdapter {
    /// Checks the pairs and rows of embedding and head, whose number of rows is `vocab_size` unless
    /// the adapter stores other matrices.
    pub(super) fn check_tables(&self, vocab_size: usize, d_model: usize) -> Result<()> {
        let rows_of = |module: &str| {
            let name = format!("{module}.weight");
            let stored = self.changes.whole().find(|(known, _)| **known == name);
            stored.and_then(|(_, stored)| stored.shape.first().copied())
        };
        let tables = [EMBEDDING_MODULE, Architecture::HEAD_LAYER];
        let rows = tables.iter().find_map(|module| rows_of(module));
        let rows = rows.unwrap_or(vocab_size);
        for module in tables {
            if let Some(pair) = self.layers.get(module) {
                check(module, [rows, d_model], pair)?;
            }
            if let Some(new) = self.changes.tokens.get(module)
                && let Some(found) = new.tokens.iter().find(|token| **token as usize >= rows)
            {
                return Err(bad_field(
                    "trainable_token_indices",
                    format!("{found}, expected ids under {rows}"),
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::changes::TokenRows;
    use super::*;

    const HEAD: &str = Architecture::HEAD_LAYER;

    fn matrix(rows: usize, salt: usize) -> Matrix {
        Matrix::from_fn(rows, 3, |i, j| ((i * 7 + j * 5 + salt) % 11) as f32 - 4.5)
    }

    fn tied() -> Tables {
        Tables {
            embedding: matrix(6, 1),
            head: None,
        }
    }

    fn apart() -> Tables {
        Tables {
            head: Some(matrix(6, 2)),
            ..tied()
        }
    }

    fn stored(mut adapter: LoraAdapter, module: &str, matrix: &Matrix, own: bool) -> LoraAdapter {
        let stored = Stored {
            shape: vec![matrix.rows(), matrix.cols()],
            values: matrix.as_slice().to_vec(),
        };
        let changes = &mut adapter.changes;
        let tensors = match own {
            true => &mut changes.copies,
            false => &mut changes.tensors,
        };
        tensors.insert(format!("{module}.weight"), stored);
        adapter
    }

    fn with_pair(mut adapter: LoraAdapter, module: &str) -> LoraAdapter {
        let a = Matrix::from_fn(2, 3, |i, j| (i + 2 * j) as f32 - 1.5);
        let b = Matrix::from_fn(6, 2, |i, j| (i * j) as f32 + 0.5);
        let pair = LoraWeights::new(a, b, 0.25).unwrap();
        adapter.layers.insert(module.into(), pair);
        adapter
    }

    fn ensured(mut adapter: LoraAdapter) -> LoraAdapter {
        adapter.changes.tied = true;
        adapter
    }

    fn plus_pair(table: &Matrix, module: &str) -> Matrix {
        added(
            table.clone(),
            &with_pair(LoraAdapter::default(), module).layers[module],
        )
    }

    #[test]
    fn a_stored_matrix_goes_to_both_or_to_its_module_alone() {
        let (new, none) = (matrix(8, 3), LoraAdapter::default);
        let shared = |tables: Tables| (tables.embedding, tables.head);
        for module in [EMBEDDING_MODULE, HEAD] {
            let given = stored(none(), module, &new, false)
                .changed_tables(tied())
                .unwrap();
            assert_eq!(shared(given), (new.clone(), None));
            // A copy of one of them with another number of rows leaves the other behind.
            let copy = stored(none(), module, &new, true);
            assert!(copy.changed_tables(tied()).is_err());
            let copy = ensured(copy).changed_tables(tied()).unwrap();
            assert_eq!(shared(copy), (new.clone(), None));
        }
        let head = stored(none(), HEAD, &matrix(6, 4), true);
        let found = head.changed_tables(tied()).unwrap();
        assert_eq!(shared(found), (matrix(6, 1), Some(matrix(6, 4))));
        for own in [false, true] {
            let one = stored(none(), EMBEDDING_MODULE, &new, own);
            let same = stored(one.clone(), HEAD, &new, own);
            let found = same.changed_tables(tied()).unwrap();
            assert_eq!(shared(found), (new.clone(), None));
            let two = stored(one, HEAD, &matrix(8, 5), own);
            for before in [tied(), apart()] {
                let found = two.changed_tables(before).unwrap();
                assert_eq!(shared(found), (new.clone(), Some(matrix(8, 5))));
            }
        }
        // A larger base, and a copy of its head.
        let rows = stored(none(), EMBEDDING_MODULE, &new, false);
        let rows = stored(rows, HEAD, &matrix(8, 5), true);
        let found = rows.changed_tables(tied()).unwrap();
        assert_eq!(shared(found), (new.clone(), Some(matrix(8, 5))));
        let narrow = Stored {
            shape: vec![6, 2],
            values: vec![0.0; 12],
        };
        let mut bad = none();
        bad.changes.tensors.insert("lm_head.weight".into(), narrow);
        assert!(bad.changed_tables(tied()).is_err());
    }

    #[test]
    fn pairs_of_a_shared_matrix_part_it_unless_the_adapter_ties_them() {
        let none = LoraAdapter::default;
        let before = matrix(6, 1);
        let found = with_pair(none(), HEAD).changed_tables(tied()).unwrap();
        assert_eq!(found.embedding, before);
        assert_eq!(found.head, Some(plus_pair(&before, HEAD)));
        let found = with_pair(none(), EMBEDDING_MODULE)
            .changed_tables(tied())
            .unwrap();
        assert_eq!(found.embedding, plus_pair(&before, EMBEDDING_MODULE));
        assert_eq!(found.head, Some(before.clone()));
        let both = with_pair(with_pair(none(), EMBEDDING_MODULE), HEAD);
        for adapter in [
            with_pair(none(), EMBEDDING_MODULE),
            with_pair(none(), HEAD),
            both.clone(),
        ] {
            let found = ensured(adapter).changed_tables(tied()).unwrap();
            assert_eq!(found.embedding, plus_pair(&before, HEAD));
            assert_eq!(found.head, None);
        }
        let found = both.changed_tables(apart()).unwrap();
        assert_eq!(found.head, Some(plus_pair(&matrix(6, 2), HEAD)));
        // A pair of more rows than the matrix fits one that the adapter stores.
        let rows = with_pair(stored(none(), EMBEDDING_MODULE, &matrix(7, 3), false), HEAD);
        assert!(rows.changed_tables(tied()).is_err());
    }

    #[test]
    fn token_rows_replace_rows_of_both_or_one() {
        let rows = |module: &str, tokens: [u32; 2]| {
            let mut adapter = LoraAdapter::default();
            let rows = TokenRows {
                tokens: tokens.to_vec(),
                rows: matrix(2, 9),
            };
            adapter.changes.tokens.insert(module.into(), rows);
            adapter
        };
        let mut expected = matrix(6, 1);
        expected.row_mut(4).copy_from_slice(matrix(2, 9).row(0));
        expected.row_mut(0).copy_from_slice(matrix(2, 9).row(1));
        let found = rows(EMBEDDING_MODULE, [4, 0])
            .changed_tables(tied())
            .unwrap();
        assert_eq!((found.embedding, found.head), (expected.clone(), None));
        let found = rows(EMBEDDING_MODULE, [4, 0])
            .changed_tables(apart())
            .unwrap();
        assert_eq!(
            (found.embedding, found.head),
            (expected.clone(), Some(matrix(6, 2)))
        );
        let found = rows(HEAD, [4, 0]).changed_tables(tied()).unwrap();
        assert_eq!(
            (found.embedding, found.head),
            (matrix(6, 1), Some(expected))
        );
        let error = rows(HEAD, [4, 6]).changed_tables(tied()).unwrap_err();
        assert!(matches!(
            error,
            Error::TokenOutOfRange {
                found: 6,
                vocab_size: 6
            }
        ));
    }
}
