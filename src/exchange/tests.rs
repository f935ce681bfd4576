use super::*;

const CLASSIFIER: &str = "model = bert(layers: 1, hidden: 4, heads: 1, ffn: 4, vocab: 9, context: 8)";
const GENERATOR: &str = "model = gpt2(layers: 1, hidden: 4, heads: 1, ffn: 4, vocab: 9, context: 8)";
/// A model whose positions skip the id 1.
const SKIPPING: &str = "model = roberta(layers: 1, hidden: 4, heads: 1, ffn: 4, vocab: 9, context: 10)";

fn ints(shape: &[u64], x: &[i64]) -> Stored {
    Stored { shape: shape.to_vec(), data: Data::I64(x.to_vec()) }
}

/// Reads a batch of these tensors for the model of a spec.
fn read(spec: &str, tensors: &[(&str, Stored)]) -> Result<Padded, String> {
    let model = peft_grammar::check("spec.peft", spec, &peft_grammar::no_imports).expect("sound");
    let mut file = TensorFile::default();
    file.tensors.extend(tensors.iter().map(|(name, stored)| (format!("inputs.{name}"), stored.clone())));
    batch(&file, "inputs.", Path::new("file"), &model).map_err(|e| e.to_string())
}

#[test]
fn labels_that_do_not_fit_are_refused() {
    let read = |spec, labels: Stored| {
        read(spec, &[("ids", ints(&[2, 1], &[7, 8])), ("labels", labels)]).map(|padded| padded.batch.labels)
    };
    assert_eq!(read(GENERATOR, ints(&[2, 1], &[-100, -100])), Ok(vec![]));
    assert_eq!(read(CLASSIFIER, ints(&[2], &[1, 0])), Ok(vec![1, 0]));
    assert_eq!(read(CLASSIFIER, ints(&[2], &[-100, -100])), Ok(vec![]));
    for (spec, labels, words) in [
        (CLASSIFIER, ints(&[2], &[0, 1 << 32]), "`inputs.labels` holds 4294967296: too large"),
        (CLASSIFIER, ints(&[1], &[0]), "`inputs.labels` is [1], and for these ids it should be [2]"),
        (GENERATOR, ints(&[2], &[1, 0]), "`inputs.labels` is [2], and for these ids it should be [2, 1]"),
        (CLASSIFIER, ints(&[2], &[-1, 0]), "`inputs.labels` is -1 in row 0; an ignored label is -100"),
        (GENERATOR, ints(&[2, 1], &[-100, -7]), "`inputs.labels` is -7 in row 1, column 0"),
        (CLASSIFIER, ints(&[2], &[0, -100]), "is -100 in row 1: give every row a class, or none"),
    ] {
        let message = read(spec, labels).expect_err("refused");
        assert!(message.contains("file") && message.contains(words), "{message}");
    }
}

#[test]
fn masked_tokens_are_left_out_and_keep_their_positions() {
    let ids = || ("ids", ints(&[2, 4], &[1, 5, 6, 7, 8, 2, 1, 3]));
    let mask = |x: &[i64]| ("mask", ints(&[2, 4], x));
    let kept = |spec, mask| {
        let Padded { batch, columns, .. } = read(spec, &[ids(), mask]).expect("sound");
        (batch.lengths, batch.ids, batch.positions, columns)
    };
    // With padding on the left and a hole, positions are columns.
    let odd = || mask(&[0, 1, 1, 1, 1, 0, 0, 1]);
    assert_eq!(kept(GENERATOR, odd()), (vec![3, 2], vec![5, 6, 7, 8, 3], vec![1, 2, 3, 0, 3], vec![1, 2, 3, 0, 3]));
    // The id 1 does not count towards positions, masked or not; the id 2 counts although it is masked.
    assert_eq!(kept(SKIPPING, odd()), (vec![3, 2], vec![5, 6, 7, 8, 3], vec![0, 1, 2, 0, 2], vec![1, 2, 3, 0, 3]));
    // With padding on the right, positions count from 0.
    let right = mask(&[1, 1, 0, 0, 1, 1, 1, 1]);
    assert_eq!(kept(GENERATOR, right).2, [0, 1, 0, 1, 2, 3]);

    let all = || mask(&[1; 8]);
    let cases: [(&[(&str, Stored)], &str); 9] = [
        (&[mask(&[1, 1, 1, 1, 1, 2, 0, 0])], "`inputs.mask` is 2 in row 1, column 1; it is 1 for a token, else 0"),
        (&[mask(&[1, 1, 1, 1, 0, 0, 0, 0])], "`inputs.mask` leaves no token of row 1"),
        (&[("mask", ints(&[2, 3], &[1; 6]))], "`inputs.mask` is [2, 3], and for these ids it should be [2, 4]"),
        (&[all(), ("lengths", ints(&[2], &[4, 3]))], "`inputs.lengths` do not agree on row 1"),
        (&[("lengths", ints(&[2], &[5, 3]))], "`inputs.lengths` is 5 in row 0; it should be a number from 1 to 4"),
        (&[("lengths", ints(&[2], &[4, 0]))], "`inputs.lengths` is 0 in row 1"),
        (&[("lengths", ints(&[3], &[4, 3, 1]))], "`inputs.lengths` is [3]"),
        (&[("attention_mask", ints(&[2, 4], &[1; 8]))], "call it `inputs.mask`"),
        (&[("colour", ints(&[1], &[1]))], "`inputs.colour` is not a tensor of a batch"),
    ];
    for (tensors, words) in cases {
        let message = read(GENERATOR, &[&[ids()], tensors].concat()).expect_err("refused");
        assert!(message.contains(words), "{message}");
    }
    assert!(read(GENERATOR, &[ids(), all(), ("lengths", ints(&[2], &[4, 4]))]).is_ok());
    for shape in [[0, 4], [2, 0]] {
        let message = read(GENERATOR, &[("ids", ints(&shape, &[]))]).expect_err("refused");
        assert!(message.contains("there is no token in it"), "{message}");
    }
}

/// The token in the column before a label predicts it.
#[test]
fn masked_tokens_cannot_predict_labels() {
    let read = |mask: &[i64], labels: &[i64]| {
        let ids = ("ids", ints(&[1, 5], &[3, 4, 5, 6, 7]));
        read(GENERATOR, &[ids, ("mask", ints(&[1, 5], mask)), ("labels", ints(&[1, 5], labels))])
            .map(|padded| (padded.batch.targets, padded.batch.labels))
    };
    let no = -100;
    assert_eq!(read(&[1, 1, 1, 1, 1], &[2, 4, no, 6, 7]), Ok((vec![0, 2, 3], vec![4, 6, 7])));
    assert_eq!(read(&[0, 0, 1, 1, 1], &[no, no, no, 6, 7]), Ok((vec![0, 1], vec![6, 7])));
    // A label in the first masked column is predicted by the unmasked token before it.
    assert_eq!(read(&[1, 1, 0, 1, 1], &[no, no, 5, no, 7]), Ok((vec![1, 2], vec![5, 7])));
    let message = read(&[1, 1, 0, 0, 1], &[no, no, 5, 6, no]).expect_err("refused");
    assert!(message.contains("`inputs.labels` is 6 in row 0, column 3, which the masked token before it"), "{message}");
}

/// Token labels belong to their own tokens, and a regression has one number for each sequence.
#[test]
fn token_labels_and_numbers_are_read() {
    let tagger = format!("{CLASSIFIER}\ntask t {{ kind: token_classification  labels: [\"O\", \"A\", \"B\"] }}");
    let ids = || ("ids", ints(&[2, 3], &[1, 5, 6, 7, 8, 2]));
    let mask = || ("mask", ints(&[2, 3], &[1, 1, 0, 1, 1, 1]));
    let labels = |x: &[i64]| ("labels", ints(&[2, 3], x));
    let batch = read(&tagger, &[ids(), mask(), labels(&[2, -100, -100, -100, 0, 1])]).expect("sound").batch;
    assert_eq!((batch.targets, batch.labels), (vec![0, 3, 4], vec![2, 0, 1]));
    let message = read(&tagger, &[ids(), mask(), labels(&[2, -100, 1, -100, 0, 1])]).expect_err("refused");
    assert!(message.contains("`inputs.labels` is 1 in row 0, column 2, which is masked"), "{message}");

    let numbers = format!("{CLASSIFIER}\ntask t {{ kind: regression }}");
    let floats = |shape: &[u64], x: &[f32]| ("labels", Stored::f32(shape.to_vec(), x.to_vec()));
    for shape in [&[2][..], &[2, 1]] {
        let padded = read(&numbers, &[ids(), floats(shape, &[0.5, -2.0])]).expect("sound");
        assert_eq!((&padded.batch.numbers[..], padded.batch.ends()), (&[0.5, -2.0][..], vec![2, 5]));
        assert_eq!(padded.without_loss(), None);
    }
    assert_eq!(read(&numbers, &[ids(), ("labels", ints(&[2], &[3, 4]))]).expect("sound").batch.numbers, [3.0, 4.0]);
    assert!(read(&numbers, &[ids()]).expect("sound").without_loss().is_some());
    for (labels, words) in [
        (floats(&[3], &[1.0; 3]), "`inputs.labels` is [3], and for these ids it should be [2]"),
        (floats(&[2], &[1.0, f32::NAN]), "`inputs.labels` is NaN in row 1"),
    ] {
        let message = read(&numbers, &[ids(), labels]).expect_err("refused");
        assert!(message.contains(words), "{message}");
    }
}
