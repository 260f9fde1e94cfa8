from crossx.report.generic_tables import MAX_ROWS, Table, cell, tables_of


def test_plain_values_are_one_table_and_objects_others():
    values = {
        "n": 40,
        "stages": {"last": {"iou": 0.123456, "hit": None}, "merged": {"iou": 1.0}},
        "pairs": [{"a": "x", "b": True}],
        "deep": {"er": {"value": 1}},
        "parts": ["beak", "wing"],
        "grid": [[1, 2], [3]],
    }
    assert tables_of(values) == [
        Table("", ("measure", "value"), (("n", "40"), ("parts", "beak, wing"))),
        Table("stages", ("", "iou", "hit"), (("last", "0.1235", "—"), ("merged", "1", ""))),
        Table("pairs", ("", "a", "b"), (("1", "x", "yes"),)),
        Table("deep", ("", "value"), (("er", "1"),)),
        Table("grid", ("measure", "value"), (("1", "1, 2"), ("2", "3"))),
    ]


def test_long_tables_and_lists_are_cut():
    (table,) = tables_of({"classes": {str(i): {"n": i} for i in range(MAX_ROWS + 5)}})
    assert (len(table.rows), table.left_out) == (MAX_ROWS, 5)
    assert cell(list(range(20))).endswith("11 and 8 more")


def test_an_empty_object_is_no_table():
    assert tables_of({}) == tables_of({"a": {}, "b": {"c": {}}}) == []
